// Package shop, with GORM: the event in the transaction of the models, and a consumer that works on an event once. Not run by
// the tests.
//
// The model has just the columns that a producer may name; GORM reads back the id alone. Use tx and not db.
package shop

import (
	"strconv"

	"gorm.io/datatypes"
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

func PlaceOrder(db *gorm.DB, customer string, amount int) (order Order, err error) {
	order = Order{Customer: customer, Amount: amount}
	err = db.Transaction(func(tx *gorm.DB) error {
		if err := tx.Create(&order).Error; err != nil {
			return err
		}
		return tx.Create(&OutboxEvent{
			EventType: "order.placed", AggregateType: "order", AggregateID: strconv.FormatInt(order.ID, 10),
			EventData: datatypes.JSONMap{"order_id": order.ID, "customer": customer, "amount": amount},
		}).Error
	})
	return order, err
}

// OnOrderPlaced gets an event by its id: message_id of RabbitMQ, the header webhook-id. It may come twice.
func OnOrderPlaced(db *gorm.DB, eventID string, orderID int64) error {
	return db.Transaction(func(tx *gorm.DB) error {
		var first bool
		if err := tx.Raw("SELECT outbox.first_time('invoicing', ?)", eventID).Scan(&first).Error; err != nil || !first {
			return err
		}
		return tx.Create(&Invoice{OrderID: orderID}).Error
	})
}
