"""What the suites share: problems, peers, how a row is measured, tables and plots."""
