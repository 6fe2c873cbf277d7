// With database/sql (and any driver; here lib/pq): the event in the transaction of the order, and a consumer that works on an
// event once. Run by hand, not by the tests.
//
// Use tx and not db: db.Exec takes another connection, and with it another transaction.
package main

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"log"
	"os"
	"strconv"

	_ "github.com/lib/pq"
)

func placeOrder(ctx context.Context, tx *sql.Tx, customer string, amount int) (id int64, err error) {
	insert := `INSERT INTO orders (customer, amount) VALUES ($1, $2) RETURNING id`
	if err = tx.QueryRowContext(ctx, insert, customer, amount).Scan(&id); err != nil {
		return 0, err
	}
	data, err := json.Marshal(map[string]any{"order_id": id, "customer": customer, "amount": amount})
	if err != nil {
		return 0, err
	}
	publish := `SELECT outbox.publish('order.placed', $1::text::jsonb, 'order', $2)`
	_, err = tx.ExecContext(ctx, publish, string(data), strconv.FormatInt(id, 10))
	return id, err
}

// onOrderPlaced gets an event by its id: message_id of RabbitMQ, the header webhook-id. It may come twice.
func onOrderPlaced(ctx context.Context, tx *sql.Tx, eventID string, orderID int64) error {
	var first bool
	if err := tx.QueryRowContext(ctx, `SELECT outbox.first_time('invoicing', $1)`, eventID).Scan(&first); err != nil || !first {
		return err
	}
	_, err := tx.ExecContext(ctx, `INSERT INTO invoices (order_id) VALUES ($1)`, orderID)
	return err
}

func inTransaction(ctx context.Context, db *sql.DB, work func(tx *sql.Tx) error) error {
	tx, err := db.BeginTx(ctx, nil)
	if err != nil {
		return err
	}
	defer tx.Rollback() // does nothing after Commit
	if err := work(tx); err != nil {
		return err
	}
	return tx.Commit()
}

func main() {
	ctx := context.Background()
	db, err := sql.Open("postgres", os.Getenv("DATABASE_URL"))
	if err != nil {
		log.Fatal(err)
	}
	defer db.Close()
	var id int64
	if err := inTransaction(ctx, db, func(tx *sql.Tx) (err error) {
		id, err = placeOrder(ctx, tx, "Ada", 99)
		return err
	}); err != nil {
		log.Fatal(err)
	}
	refused := errors.New("the card was refused")
	if err := inTransaction(ctx, db, func(tx *sql.Tx) error {
		if _, err := placeOrder(ctx, tx, "Bob", 1); err != nil {
			return err
		}
		return refused // Neither Bob's order nor its event is there.
	}); err != refused {
		log.Fatal(err)
	}
	const eventID = "01a20bd9-1f5f-7240-9fb8-9e5a24cc6a6c"
	for range 2 {
		if err := inTransaction(ctx, db, func(tx *sql.Tx) error {
			return onOrderPlaced(ctx, tx, eventID, id)
		}); err != nil {
			log.Fatal(err)
		}
	}
}
