"""Tables, plots and one HTML page, made from what is stored."""
