"""From a sweep to runs and trials, with identities and estimates; needs no GPU, Ray or network."""
