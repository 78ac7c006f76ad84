"""GaLore and its successors: all weights train, and the optimizer's state is low-rank."""
