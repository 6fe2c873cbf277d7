
-- Whoever was granted a part may need new functions for it.
SELECT outbox._grant_again();
