"""Integrations with libraries that call KDA: each is imported by the user, and imports its library itself."""
