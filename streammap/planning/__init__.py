"""What is asked for -> one linear form for each tensor. No tensor is read here."""
