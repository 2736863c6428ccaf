"""Progressive validation: small runs that earn larger ones, and what they say of these in advance."""
