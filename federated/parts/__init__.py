"""What several algorithms share: ensembles, control variates, the selection of channels."""
