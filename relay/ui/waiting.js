// What is outstanding and why: aggregates that wait for one of their events, deliveries that are tried again, and events
// that are scheduled.

import { aggregate, ErrorText, EventLink, html, State, Table, Time } from './parts.js'

export const title = 'Waiting'
export const load = (read) => read('waiting')

export function View({ data }) {
  return html`
    <p class="note">New events that no relay has tried yet are counted above and not listed here.${data.all ? '' : ' More than 10,000 deliveries are outstanding or dead; these are a part of them.'}</p>
    <section aria-labelledby="blocked"><h2 id="blocked">Aggregates that wait</h2>
      <${Table} label="Aggregates that wait" columns=${['Aggregate', 'Destination', '#Behind', 'Waits for', 'State', 'Next try', 'Error']} empty="No aggregate waits for one of its events.">
        ${data.blocked.map((row) => html`<tr key=${`${row.destination} ${row.aggregate_type} ${row.aggregate_id}`}>
          <th scope="row">${aggregate(row)}</th><td>${row.destination || '–'}</td><td class="number" data-label="Behind">${row.behind}</td>
          <td><span>${row.event_type}</span><span class="sub"><${EventLink} id=${row.event_id} /></span></td><td><${State} is=${row.status} /></td>
          <td><${Time} at=${row.next_attempt_at} /></td><td><${ErrorText} text=${row.last_error} /></td></tr>`)}
      </${Table}></section>
    <section aria-labelledby="due"><h2 id="due">Deliveries to be tried</h2>
      <${Table} label="Deliveries to be tried" columns=${['Event', 'Destination', 'Aggregate', 'State', '#Attempts', 'Next try', 'Error']} empty="No delivery waits for its next attempt.">
        ${data.due.map((row) => html`<tr key=${`${row.id} ${row.destination}`} data-event-id=${row.event_id}>
          <th scope="row"><span class="name">${row.event_type}</span><span class="sub"><${EventLink} id=${row.event_id} /></span></th>
          <td>${row.destination || '–'}</td><td>${aggregate(row)}</td><td><${State} is=${row.status} /></td><td class="number" data-label="Attempts">${row.attempts}</td>
          <td><${Time} at=${row.next_attempt_at} /></td><td><${ErrorText} text=${row.last_error} /></td></tr>`)}
      </${Table}></section>
    <section aria-labelledby="scheduled"><h2 id="scheduled">Scheduled</h2>
      <${Table} label="Scheduled events" columns=${['Event', 'Aggregate', 'Due', 'Created']} empty="No event is scheduled.">
        ${data.scheduled.map((row) => html`<tr key=${row.event_id} data-event-id=${row.event_id}>
          <th scope="row"><span class="name">${row.event_type}</span><span class="sub"><${EventLink} id=${row.event_id} /></span></th>
          <td>${aggregate(row)}</td><td><${Time} at=${row.next_attempt_at} /></td><td><${Time} at=${row.created_at} /></td></tr>`)}
      </${Table}></section>`
}
