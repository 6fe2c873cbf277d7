// The tail: the last attempts of this relay, from its memory.

import { ErrorText, EventLink, html, State, Table, Time, useState } from './parts.js'

export const title = 'Tail'
const KEPT = 1000

// Only what is new travels; a relay that was started again begins anew.
let seen = []
export const load = async (read) => {
  const last = seen.at(-1)?.number ?? 0
  let more = await read('tail', { after: last })
  if (last > 0 && more.length === 0) {
    const all = await read('tail')
    if ((all.at(-1)?.number ?? 0) < last) [seen, more] = [[], all]
  }
  seen = [...seen, ...more].slice(-KEPT)
  return seen
}

export function View({ data }) {
  const [held, hold] = useState(null)
  const [text, setText] = useState('')
  const shown = (held || data).filter((row) => !text || `${row.event_type} ${row.destination} ${row.outcome} ${row.error || ''}`.includes(text)).slice(-300).reverse()
  return html`
    <p class="note">The last attempts of this relay only, newest first; at most 1,000 are kept, in its memory.</p>
    <div class="filter">
      <label class="field wide"><span>Contains</span><input value=${text} onInput=${(event) => setText(event.target.value)} placeholder="type, destination, outcome or error" /></label>
      <button type="button" aria-pressed=${String(held != null)} onClick=${() => hold(held ? null : data)}>${held ? `Go on (${data.length ? data.at(-1).number - (held.at(-1)?.number ?? 0) : 0} new)` : 'Hold'}</button>
    </div>
    <${Table} label="Attempts" columns=${['At', 'Event', 'Destination', '#Attempt', 'Outcome', '#ms', 'Error']} empty=${text ? 'No attempt matches.' : 'This relay has made no attempt yet.'}>
      ${shown.map((row) => html`<tr key=${row.number} data-test="tail-row" data-event-id=${row.event_id}>
        <td><${Time} at=${new Date(row.at_ms).toISOString()} /></td>
        <th scope="row"><span class="name">${row.event_type}</span><span class="sub"><${EventLink} id=${row.event_id} /></span></th>
        <td>${row.destination}</td><td class="number" data-label="Attempt">${row.attempt}</td><td><${State} is=${row.outcome} /></td>
        <td class="number" data-label="ms">${row.took_ms.toFixed(1)}</td><td><${ErrorText} text=${row.error} /></td></tr>`)}
    </${Table}>`
}
