// With GORM: the event in the transaction of the models, and a consumer that works on an event once. Run by hand, not
// by the tests.
//
// The model has just the columns that a producer may name; GORM reads back the id alone. Use tx and not db.
package main

import (
	"errors"
	"log"
	"os"
	"strconv"

	"gorm.io/datatypes"
	"gorm.io/driver/postgres"
	"gorm.io/gorm"
)

type OutboxEvent struct {
	ID            int64
	EventType     string
	AggregateType string
	AggregateID   string
	EventData     datatypes.JSONMap
}

type Order struct {
	ID       int64
	Customer string
	Amount   int
}

type Invoice struct {
	OrderID int64 `gorm:"primaryKey;autoIncrement:false"`
}

func placeOrder(tx *gorm.DB, customer string, amount int) (int64, error) {
	order := Order{Customer: customer, Amount: amount}
	if err := tx.Create(&order).Error; err != nil {
		return 0, err
	}
	return order.ID, tx.Create(&OutboxEvent{
		EventType: "order.placed", AggregateType: "order", AggregateID: strconv.FormatInt(order.ID, 10),
		EventData: datatypes.JSONMap{"order_id": order.ID, "customer": customer, "amount": amount},
	}).Error
}

// onOrderPlaced gets an event by its id: message_id of RabbitMQ, the header webhook-id. It may come twice.
func onOrderPlaced(tx *gorm.DB, eventID string, orderID int64) error {
	var first bool
	if err := tx.Raw("SELECT outbox.first_time('invoicing', ?)", eventID).Scan(&first).Error; err != nil || !first {
		return err
	}
	return tx.Create(&Invoice{OrderID: orderID}).Error
}

func main() {
	db, err := gorm.Open(postgres.Open(os.Getenv("DATABASE_URL")), &gorm.Config{})
	if err != nil {
		log.Fatal(err)
	}
	var id int64
	if err := db.Transaction(func(tx *gorm.DB) (err error) {
		id, err = placeOrder(tx, "Ada", 99)
		return err
	}); err != nil {
		log.Fatal(err)
	}
	refused := errors.New("the card was refused")
	if err := db.Transaction(func(tx *gorm.DB) error {
		if _, err := placeOrder(tx, "Bob", 1); err != nil {
			return err
		}
		return refused // Neither Bob's order nor its event is there.
	}); err != refused {
		log.Fatal(err)
	}
	const eventID = "01a20bd9-1f5f-7240-9fb8-9e5a24cc6a6c"
	for range 2 {
		if err := db.Transaction(func(tx *gorm.DB) error { return onOrderPlaced(tx, eventID, id) }); err != nil {
			log.Fatal(err)
		}
	}
}
