// JPA (Hibernate): the event in the transaction of the entities, and a consumer that works on an event once. Not run by the
// tests.
//
// A native query runs on the entity manager's own connection. Hibernate writes entities at the flush: flush() first, where
// the order of both matters or the event needs a generated key. An entity for outbox_events works as well, if it maps only
// columns that a producer may insert.
import jakarta.persistence.EntityManager;
import jakarta.transaction.Transactional;
import java.util.UUID;

public class WithJpa {
    private final EntityManager entities;

    WithJpa(EntityManager entities) {
        this.entities = entities;
    }

    @Transactional
    public Order placeOrder(String customer, long amount) {
        Order order = new Order(customer, amount);
        entities.persist(order);
        entities.flush();
        entities.createNativeQuery("SELECT outbox.publish('order.placed', CAST(:data AS jsonb), 'order', :id)", UUID.class)
                .setParameter("data", "{\"order_id\": %d, \"amount\": %d}".formatted(order.getId(), amount))
                .setParameter("id", order.getId().toString())
                .getSingleResult();
        return order;
    }

    /** eventId: message_id of RabbitMQ, the header webhook-id. It may come twice. */
    @Transactional
    public void onOrderPlaced(UUID eventId, long orderId) {
        boolean first = (Boolean) entities
                .createNativeQuery("SELECT outbox.first_time('invoicing', :id)", Boolean.class)
                .setParameter("id", eventId)
                .getSingleResult();
        if (first) {
            entities.persist(new Invoice(orderId));
        }
    }
}
