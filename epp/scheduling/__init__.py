"""From candidates to a decision: producers, then a profile of filters, weighted scorers and a picker."""
