// Package shop, with database/sql (and any driver): the event in the transaction of the order, and a consumer that works on
// an event once. Not run by the tests.
//
// Use tx and not db: db.Exec takes another connection, and with it another transaction.
package shop

import (
	"context"
	"database/sql"
	"encoding/json"
	"strconv"
)

func PlaceOrder(ctx context.Context, db *sql.DB, customer string, amount int) (id int64, err error) {
	tx, err := db.BeginTx(ctx, nil)
	if err != nil {
		return 0, err
	}
	defer tx.Rollback() // does nothing after Commit
	insert := `INSERT INTO orders (customer, amount) VALUES ($1, $2) RETURNING id`
	if err = tx.QueryRowContext(ctx, insert, customer, amount).Scan(&id); err != nil {
		return 0, err
	}
	data, err := json.Marshal(map[string]any{"order_id": id, "customer": customer, "amount": amount})
	if err != nil {
		return 0, err
	}
	publish := `SELECT outbox.publish('order.placed', $1::text::jsonb, 'order', $2)`
	if _, err = tx.ExecContext(ctx, publish, string(data), strconv.FormatInt(id, 10)); err != nil {
		return 0, err
	}
	return id, tx.Commit()
}

// OnOrderPlaced gets an event by its id: message_id of RabbitMQ, the header webhook-id. It may come twice.
func OnOrderPlaced(ctx context.Context, db *sql.DB, eventID string, orderID int64) error {
	tx, err := db.BeginTx(ctx, nil)
	if err != nil {
		return err
	}
	defer tx.Rollback()
	var first bool
	if err = tx.QueryRowContext(ctx, `SELECT outbox.first_time('invoicing', $1)`, eventID).Scan(&first); err != nil {
		return err
	}
	if first {
		if _, err = tx.ExecContext(ctx, `INSERT INTO invoices (order_id) VALUES ($1)`, orderID); err != nil {
			return err
		}
	}
	return tx.Commit()
}
