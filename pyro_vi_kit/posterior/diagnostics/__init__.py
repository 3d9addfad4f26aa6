"""Whether to believe a fit: importance weights, chains, the verdict, and questions to the data."""
