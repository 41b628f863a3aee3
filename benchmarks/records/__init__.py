"""What is done with records: a report, a comparison, figures for the documents."""
