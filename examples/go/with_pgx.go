// With pgx: the event in the transaction of the order, and a consumer that works on an event once. Run by hand, not by
// the tests.
//
// Use tx and not the pool: pool.Exec takes another connection, and with it another transaction.
package main

import (
	"context"
	"errors"
	"log"
	"os"
	"strconv"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

func placeOrder(ctx context.Context, tx pgx.Tx, customer string, amount int) (id int64, err error) {
	insert := `INSERT INTO orders (customer, amount) VALUES ($1, $2) RETURNING id`
	if err := tx.QueryRow(ctx, insert, customer, amount).Scan(&id); err != nil {
		return 0, err
	}
	data := map[string]any{"order_id": id, "customer": customer, "amount": amount}
	_, err = tx.Exec(ctx, `SELECT outbox.publish('order.placed', $1, 'order', $2)`, data, strconv.FormatInt(id, 10))
	return id, err
}

// onOrderPlaced gets an event by its id: message_id of RabbitMQ, the header webhook-id. It may come twice.
func onOrderPlaced(ctx context.Context, tx pgx.Tx, eventID string, orderID int64) error {
	var first bool
	if err := tx.QueryRow(ctx, `SELECT outbox.first_time('invoicing', $1)`, eventID).Scan(&first); err != nil || !first {
		return err
	}
	_, err := tx.Exec(ctx, `INSERT INTO invoices (order_id) VALUES ($1)`, orderID)
	return err
}

func main() {
	ctx := context.Background()
	pool, err := pgxpool.New(ctx, os.Getenv("DATABASE_URL"))
	if err != nil {
		log.Fatal(err)
	}
	defer pool.Close()
	var id int64
	if err := pgx.BeginFunc(ctx, pool, func(tx pgx.Tx) (err error) {
		id, err = placeOrder(ctx, tx, "Ada", 99)
		return err
	}); err != nil {
		log.Fatal(err)
	}
	refused := errors.New("the card was refused")
	if err := pgx.BeginFunc(ctx, pool, func(tx pgx.Tx) error {
		if _, err := placeOrder(ctx, tx, "Bob", 1); err != nil {
			return err
		}
		return refused // Neither Bob's order nor its event is there.
	}); err != refused {
		log.Fatal(err)
	}
	const eventID = "01a20bd9-1f5f-7240-9fb8-9e5a24cc6a6c"
	for range 2 {
		if err := pgx.BeginFunc(ctx, pool, func(tx pgx.Tx) error {
			return onOrderPlaced(ctx, tx, eventID, id)
		}); err != nil {
			log.Fatal(err)
		}
	}
}
