"""Who answers: one file a provider; each SDK is imported only inside its own file."""
