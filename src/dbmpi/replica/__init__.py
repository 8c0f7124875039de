"""One model over some ranks (section 3 of the paper): placement, plans, exchanges."""
