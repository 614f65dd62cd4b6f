"""The parts of training: what `ao.train`'s loop is made of."""
