"""Features, retrieval, figures and reports of trained networks."""
