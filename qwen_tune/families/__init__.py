"""What is known of each architecture, as data: one light module each."""
