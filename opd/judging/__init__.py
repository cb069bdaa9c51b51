"""Models without a trainer: judged against each other, asked, and made to score."""
