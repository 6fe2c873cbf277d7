// One event: what it is, what became of it at each destination, and, when asked for, what it holds.

import { aggregate, ErrorText, html, State, Table, Time, useState } from './parts.js'

export const title = 'Event'
export const load = async (read, filter, id) => {
  const [event, attempts] = await Promise.all([read(`events/${encodeURIComponent(id)}`), read('tail')])
  return { ...event, attempts: attempts.filter((attempt) => attempt.event_id === id) }
}

function Copy({ text, label }) {
  const [done, set] = useState(false)
  if (!navigator.clipboard) return null
  return html`<button type="button" onClick=${async () => { await navigator.clipboard.writeText(text); set(true) }}>${done ? 'Copied' : label}</button>`
}

export function View({ data, id, may, act, confirm }) {
  const event = data.event
  if (!event) return html`<p class="empty">There is no event <code>${id}</code>. It may have been removed after its retention.</p>`
  const destinations = Object.entries(event.destinations || {})
  const replay = () => confirm({
    title: 'Replay this event?', verb: 'Replay',
    text: event.status === 'processed' ? '1 event will be owed once more to all that want it.' : '1 event will be owed again to those that gave it up.',
    run: () => act('replay', { event_id: event.event_id }, (done) => (done === 'true' ? 'The event is owed again' : 'Nothing to replay: the event is owed already')),
  })
  const steps = [
    ['created', event.created_at, null],
    ...(event.available_at ? [['due', event.available_at, null]] : []),
    ...data.attempts.map((attempt) => [attempt.outcome, new Date(attempt.at_ms).toISOString(), `${attempt.destination}, attempt ${attempt.attempt}, ${attempt.took_ms.toFixed(1)} ms`]),
    ...(event.processed_at ? [['processed', event.processed_at, null]] : []),
  ]
  return html`
    <div class="headline"><p class="big"><${State} is=${event.status} test="event-status" /> <span>${event.event_type}</span> <span class="sub inline">${event.event_version}</span></p>
      <div class="buttons">${may.replay && (event.status === 'failed' || event.status === 'processed' || destinations.some(([, one]) => one.status === 'failed')) && html`<button type="button" data-test="replay" onClick=${replay}>Replay…</button>`}
      <${Copy} label="Copy SQL" text=${`SELECT jsonb_pretty(outbox.event('${event.event_id}'));`} /></div></div>
    <dl class="facts">
      <div><dt>event_id</dt><dd><code>${event.event_id}</code></dd></div>
      <div><dt>id</dt><dd>${event.id}</dd></div>
      <div><dt>Aggregate</dt><dd>${aggregate(event)}</dd></div>
      <div><dt>Tenant</dt><dd>${event.tenant_id ?? '–'}</dd></div>
      <div><dt>Failed attempts</dt><dd>${event.retry_count}</dd></div>
      ${event.last_error && html`<div class="wide"><dt>Last error</dt><dd>${event.last_error}</dd></div>`}
    </dl>
    <section aria-labelledby="by-destination"><h2 id="by-destination">By destination</h2>
      <${Table} label="What became of it by destination" columns=${['Destination', 'State', '#Failed attempts', 'Next try', 'Error']} empty="No destination wants it.">
        ${destinations.map(([name, one]) => html`<tr key=${name}><th scope="row">${name || '–'}</th><td><${State} is=${one.status} /></td>
          <td class="number" data-label="Failed attempts">${one.attempts ?? '–'}</td><td><${Time} at=${one.next_attempt_at} /></td><td><${ErrorText} text=${one.last_error} /></td></tr>`)}
      </${Table}></section>
    <section aria-labelledby="steps"><h2 id="steps">Its way</h2>
      <ol class="steps">${steps.map(([what, at, more], n) => html`<li key=${n}><${Time} at=${at} /> <${State} is=${what} /> ${more && html`<span class="sub inline">${more}</span>`}</li>`)}</ol>
      <p class="note">Attempts are those of this relay among its last 1,000.</p></section>
    <section aria-labelledby="payload"><h2 id="payload">What it holds</h2>
      <details><summary>event_data</summary><pre data-test="event-data">${event.event_data}</pre><${Copy} label="Copy" text=${event.event_data} /></details>
      <details><summary>metadata</summary><pre data-test="metadata">${event.metadata}</pre></details></section>`
}
