# Ruby on Rails: the event in the transaction of the records, and a consumer that works on an event once. Not run by the
# tests.
#
# Active Record names all columns of a model that have a value, and reads the table's columns from the catalog. With
# partial_inserts it leaves out those that still have their default; without, it would name `status` too, which a producer
# may not. An after_commit callback is the opposite of an outbox: what it does is lost if the process dies.
class OutboxEvent < ApplicationRecord
  self.partial_inserts = true
end

class Order < ApplicationRecord
  def self.place(customer, amount)
    transaction do
      order = create!(customer: customer, amount: amount)
      OutboxEvent.create!(event_type: "order.placed", aggregate_type: "order", aggregate_id: order.id.to_s,
                          event_data: { order_id: order.id, customer: customer, amount: amount })
      order
    end
  end
end

class Invoice < ApplicationRecord
  # event_id: message_id of RabbitMQ, the header webhook-id. It may come twice.
  def self.on_order_placed(event_id, data)
    transaction do
      first = sanitize_sql(["SELECT outbox.first_time('invoicing', ?)", event_id])
      create!(order_id: data["order_id"]) if connection.select_value(first)
    end
  end
end
