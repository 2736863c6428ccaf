"""Models that exist already, as `model.init_from` names them: what they are, and their weights."""
