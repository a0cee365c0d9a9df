"""`minilora explain`: a layer, an operation or a whole step, with its equation, its source in both directions and real numbers."""
