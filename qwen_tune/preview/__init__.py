"""What a person sees of the data: in a terminal, as JSON, as a page, and as an audit."""
