// Spring with JdbcTemplate: the event in the transaction of the order, and a consumer that works on an event once. Not run by
// the tests.
//
// @Transactional works on calls from other beans. An @TransactionalEventListener after the commit is the opposite of an
// outbox: what it does is lost if the process dies.
import java.util.UUID;
import org.springframework.jdbc.core.JdbcTemplate;
import org.springframework.stereotype.Service;
import org.springframework.transaction.annotation.Transactional;
import tools.jackson.databind.json.JsonMapper;

@Service
public class WithSpring {
    record OrderPlaced(long order_id, String customer, long amount) {}

    private final JdbcTemplate jdbc;
    private final JsonMapper json;

    WithSpring(JdbcTemplate jdbc, JsonMapper json) {
        this.jdbc = jdbc;
        this.json = json;
    }

    @Transactional
    public long placeOrder(String customer, long amount) {
        long id = jdbc.queryForObject(
                "INSERT INTO orders (customer, amount) VALUES (?, ?) RETURNING id", Long.class, customer, amount);
        String data = json.writeValueAsString(new OrderPlaced(id, customer, amount));
        jdbc.queryForObject("SELECT outbox.publish('order.placed', ?::jsonb, 'order', ?)", UUID.class, data, "" + id);
        return id;
    }

    /** eventId: message_id of RabbitMQ, the header webhook-id. It may come twice. */
    @Transactional
    public void onOrderPlaced(UUID eventId, OrderPlaced event) {
        if (jdbc.queryForObject("SELECT outbox.first_time('invoicing', ?)", Boolean.class, eventId)) {
            jdbc.update("INSERT INTO invoices (order_id) VALUES (?)", event.order_id());
        }
    }
}
