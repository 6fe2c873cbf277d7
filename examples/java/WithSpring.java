// Spring with JdbcTemplate: the event in the transaction of the order, and a consumer that works on an event once. Run by
// hand, not by the tests.
//
// @Transactional works on calls from other beans. An @TransactionalEventListener after the commit is the opposite of an
// outbox: what it does is lost if the process dies.
import java.util.UUID;
import javax.sql.DataSource;
import org.springframework.jdbc.core.JdbcTemplate;
import org.springframework.jdbc.datasource.DataSourceTransactionManager;
import org.springframework.jdbc.datasource.DriverManagerDataSource;
import org.springframework.stereotype.Service;
import org.springframework.transaction.annotation.Transactional;
import org.springframework.transaction.support.TransactionTemplate;

@Service
public class WithSpring {
    private final JdbcTemplate jdbc;

    public WithSpring(JdbcTemplate jdbc) {
        this.jdbc = jdbc;
    }

    @Transactional
    public long placeOrder(String customer, long amount) {
        String insert = "INSERT INTO orders (customer, amount) VALUES (?, ?) RETURNING id";
        long id = jdbc.queryForObject(insert, Long.class, customer, amount);
        String publish = "SELECT outbox.publish('order.placed',"
                + " jsonb_build_object('order_id', ?, 'customer', ?, 'amount', ?), 'order', ?)";
        jdbc.queryForObject(publish, UUID.class, id, customer, amount, Long.toString(id));
        return id;
    }

    /** eventId: message_id of RabbitMQ, the header webhook-id. It may come twice. */
    @Transactional
    public void onOrderPlaced(UUID eventId, long orderId) {
        if (jdbc.queryForObject("SELECT outbox.first_time('invoicing', ?)", Boolean.class, eventId)) {
            jdbc.update("INSERT INTO invoices (order_id) VALUES (?)", orderId);
        }
    }

    /** Without a Spring context nobody acts on @Transactional, so the template begins the transactions. */
    public static void main(String[] arguments) {
        DataSource source = new DriverManagerDataSource(System.getenv("JDBC_URL"));
        TransactionTemplate transaction = new TransactionTemplate(new DataSourceTransactionManager(source));
        WithSpring shop = new WithSpring(new JdbcTemplate(source));
        long orderId = transaction.execute(status -> shop.placeOrder("Ada", 99));
        transaction.execute(status -> {
            shop.placeOrder("Bob", 1);
            status.setRollbackOnly(); // The card was refused: neither Bob's order nor its event is there.
            return null;
        });
        UUID eventId = UUID.randomUUID();
        for (int time = 0; time < 2; time++) {
            transaction.execute(status -> {
                shop.onOrderPlaced(eventId, orderId);
                return null;
            });
        }
    }
}
