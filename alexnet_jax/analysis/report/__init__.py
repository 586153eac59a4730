"""A run's report.html: findings.py collects the data, report.html.j2 shows it."""
