// Package shop, with pgx: the event in the transaction of the order, and a consumer that works on an event once. Not run by
// the tests.
//
// Use tx and not the pool: pool.Exec takes another connection, and with it another transaction.
package shop

import (
	"context"
	"strconv"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

func PlaceOrder(ctx context.Context, pool *pgxpool.Pool, customer string, amount int) (id int64, err error) {
	err = pgx.BeginFunc(ctx, pool, func(tx pgx.Tx) error {
		insert := `INSERT INTO orders (customer, amount) VALUES ($1, $2) RETURNING id`
		if err := tx.QueryRow(ctx, insert, customer, amount).Scan(&id); err != nil {
			return err
		}
		data := map[string]any{"order_id": id, "customer": customer, "amount": amount}
		_, err := tx.Exec(ctx, `SELECT outbox.publish('order.placed', $1, 'order', $2)`, data, strconv.FormatInt(id, 10))
		return err
	})
	return id, err
}

// OnOrderPlaced gets an event by its id: message_id of RabbitMQ, the header webhook-id. It may come twice.
func OnOrderPlaced(ctx context.Context, pool *pgxpool.Pool, eventID string, orderID int64) error {
	return pgx.BeginFunc(ctx, pool, func(tx pgx.Tx) error {
		var first bool
		if err := tx.QueryRow(ctx, `SELECT outbox.first_time('invoicing', $1)`, eventID).Scan(&first); err != nil || !first {
			return err
		}
		_, err := tx.Exec(ctx, `INSERT INTO invoices (order_id) VALUES ($1)`, orderID)
		return err
	})
}
