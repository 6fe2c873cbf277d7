-- From 0.1.0 to 0.2.0: tables, types and triggers are what they were.

\layers
