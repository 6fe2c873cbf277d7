# Ruby on Rails: the event in the transaction of the records, and a consumer that works on an event once. In an
# application the models inherit from ApplicationRecord, and the connection is that of database.yml.
#
# Active Record names all columns of a model that have a value, and reads the table's columns from the catalog. With
# partial inserts it leaves out those that still have their default; without, it would name `status` too, which a producer
# may not. From Rails 7.1 on it reads back what a function makes: the id and the event_id, which a producer may, and
# created_at, which it may not unless that is ignored. An after_commit callback is the opposite of an outbox: what it does
# is lost if the process dies.
require "active_record"
require "securerandom"

class OutboxEvent < ActiveRecord::Base
  self.ignored_columns = ["created_at"]
  # Before Rails 7 there is no such setting, and all inserts are partial.
  self.partial_inserts = true if respond_to?(:partial_inserts=)
end

class Order < ActiveRecord::Base
  def self.place(customer, amount)
    transaction do
      order = create!(customer: customer, amount: amount)
      OutboxEvent.create!(event_type: "order.placed", aggregate_type: "order", aggregate_id: order.id.to_s,
                          event_data: { order_id: order.id, customer: customer, amount: amount })
      order
    end
  end
end

class Invoice < ActiveRecord::Base
  self.primary_key = "order_id"

  # event_id: message_id of RabbitMQ, the header webhook-id. It may come twice.
  def self.on_order_placed(event_id, data)
    transaction do
      first = sanitize_sql(["SELECT outbox.first_time('invoicing', ?)", event_id])
      create!(order_id: data["order_id"]) if connection.select_value(first)
    end
  end
end

ActiveRecord::Base.establish_connection(ENV.fetch("DATABASE_URL"))
order = Order.place("Ada", 99)
Order.transaction do
  Order.place("Bob", 1)
  raise ActiveRecord::Rollback # The card was refused: neither Bob's order nor its event is there.
end
event_id = SecureRandom.uuid
2.times { Invoice.on_order_placed(event_id, { "order_id" => order.id }) }
