-- The launcher starts this database's worker when the installation commits.

SELECT outbox._launch();
