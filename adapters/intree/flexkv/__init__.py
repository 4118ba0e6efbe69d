"""The names that engines' own code imports, each a thin door to the adapters beside it. Users and this project import those instead."""
