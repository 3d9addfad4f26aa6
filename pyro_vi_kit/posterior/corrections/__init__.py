"""What mends a fit after it was made: linear response, and the evidence with its error."""
