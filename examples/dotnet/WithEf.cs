// Entity Framework Core with Npgsql: the event in the transaction of the entities, and a consumer that works on an event once.
// Not run by the tests.
//
// ExecuteSqlAsync and SqlQuery use the context's connection, and with it its transaction. SaveChangesAsync comes first, where
// the event needs a generated key. With EnableRetryOnFailure, put it all into the execution strategy.
using System.Text.Json;
using Microsoft.EntityFrameworkCore;

public class Orders(ShopContext shop)
{
    public async Task<long> Place(string customer, decimal amount)
    {
        await using var transaction = await shop.Database.BeginTransactionAsync();
        var order = new Order { Customer = customer, Amount = amount };
        shop.Orders.Add(order);
        await shop.SaveChangesAsync();
        var data = JsonSerializer.Serialize(new { order_id = order.Id, customer, amount });
        await shop.Database.ExecuteSqlAsync(
            $"SELECT outbox.publish('order.placed', {data}::jsonb, 'order', {order.Id.ToString()})");
        await transaction.CommitAsync();
        return order.Id;
    }

    // eventId: message_id of RabbitMQ, the header webhook-id. It may come twice.
    public async Task OnOrderPlaced(Guid eventId, long orderId)
    {
        await using var transaction = await shop.Database.BeginTransactionAsync();
        var first = await shop.Database
            .SqlQuery<bool>($"SELECT outbox.first_time('invoicing', {eventId}) AS \"Value\"").SingleAsync();
        if (first)
        {
            shop.Invoices.Add(new Invoice { OrderId = orderId });
            await shop.SaveChangesAsync();
        }
        await transaction.CommitAsync();
    }
}
