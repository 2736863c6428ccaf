"""A run's first steps beside a plain reference: `albor canary`."""
