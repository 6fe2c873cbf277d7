-- What the recipes use beside the outbox: data of the application's own. As a superuser, in a database with the extension.
CREATE TABLE orders (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, customer text NOT NULL, amount numeric NOT NULL);
CREATE TABLE invoices (order_id bigint PRIMARY KEY);
CREATE ROLE shop LOGIN PASSWORD 'shop';
GRANT SELECT, INSERT ON orders, invoices TO shop;
SELECT outbox.grant_producer('shop');
