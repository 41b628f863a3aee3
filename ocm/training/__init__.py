"""Training of denoisers and heads: a pure function of seed and step, resumed to the same bits."""
