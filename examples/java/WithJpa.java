// JPA: the event in the transaction of the entities, and a consumer that works on an event once. Run by hand, not
// by the tests.
//
// A native query runs on the entity manager's own connection. Entities are written at the flush: flush() first, where the
// order of both matters or the event needs a generated key. An entity for outbox_events works as well, if it maps only columns
// that a producer may insert. The persistence unit "shop" has the classes Order and Invoice.
import jakarta.persistence.Entity;
import jakarta.persistence.EntityManager;
import jakarta.persistence.EntityManagerFactory;
import jakarta.persistence.GeneratedValue;
import jakarta.persistence.GenerationType;
import jakarta.persistence.Id;
import jakarta.persistence.Persistence;
import jakarta.persistence.Table;
import java.util.Map;
import java.util.UUID;
import java.util.function.Function;

public class WithJpa {
    @Entity
    @Table(name = "orders")
    public static class Order {
        @Id
        @GeneratedValue(strategy = GenerationType.IDENTITY)
        public Long id;

        public String customer;
        public long amount;
    }

    @Entity
    @Table(name = "invoices")
    public static class Invoice {
        @Id
        public long order_id;
    }

    static long placeOrder(EntityManager entities, String customer, long amount) {
        Order order = new Order();
        order.customer = customer;
        order.amount = amount;
        entities.persist(order);
        entities.flush();
        entities.createNativeQuery("SELECT CAST(outbox.publish('order.placed', CAST(?1 AS jsonb), 'order', ?2) AS text)")
                .setParameter(1, "{\"order_id\": %d, \"amount\": %d}".formatted(order.id, amount))
                .setParameter(2, order.id.toString())
                .getSingleResult();
        return order.id;
    }

    /** eventId: message_id of RabbitMQ, the header webhook-id. It may come twice. */
    static Void onOrderPlaced(EntityManager entities, UUID eventId, long orderId) {
        boolean first = (Boolean) entities
                .createNativeQuery("SELECT outbox.first_time('invoicing', CAST(?1 AS uuid))")
                .setParameter(1, eventId.toString())
                .getSingleResult();
        if (first) {
            Invoice invoice = new Invoice();
            invoice.order_id = orderId;
            entities.persist(invoice);
        }
        return null;
    }

    /** What @Transactional does in Spring or Jakarta EE. */
    static <T> T inTransaction(EntityManagerFactory factory, Function<EntityManager, T> work) {
        EntityManager entities = factory.createEntityManager();
        entities.getTransaction().begin();
        try {
            T result = work.apply(entities);
            entities.getTransaction().commit();
            return result;
        } finally {
            if (entities.getTransaction().isActive()) {
                entities.getTransaction().rollback();
            }
            entities.close();
        }
    }

    public static void main(String[] arguments) {
        EntityManagerFactory shop = Persistence.createEntityManagerFactory(
                "shop", Map.of("jakarta.persistence.jdbc.url", System.getenv("JDBC_URL")));
        long orderId = inTransaction(shop, entities -> placeOrder(entities, "Ada", 99));
        RuntimeException refused = new RuntimeException("the card was refused");
        try {
            inTransaction(shop, entities -> {
                placeOrder(entities, "Bob", 1);
                throw refused;
            });
        } catch (RuntimeException error) {
            if (error != refused) { // Neither Bob's order nor its event is there.
                throw error;
            }
        }
        UUID eventId = UUID.randomUUID();
        for (int time = 0; time < 2; time++) {
            inTransaction(shop, entities -> onOrderPlaced(entities, eventId, orderId));
        }
        shop.close();
    }
}
