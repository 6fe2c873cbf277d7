// Destinations: their states, what they wait for and why, and what an operator can do about it.

import { Countdown, ErrorText, Field, html, State, Table, useEffect, useState } from './parts.js'

export const title = 'Destinations'
export const load = (read, filter) => Promise.all([read('destinations', { name: filter.name }), read('tail'), read('under-way')])
export const filters = ['name']

const SHOWN = 24

// The last attempts of this relay, a bar each: low is well, high is not.
function Outcomes({ attempts }) {
  const bad = attempts.filter((attempt) => attempt.outcome !== 'delivered').length
  const label = `${attempts.length - bad} of the last ${attempts.length} attempts of this relay delivered`
  if (attempts.length === 0) return html`<span class="none" title="no attempt of this relay yet">–</span>`
  return html`<svg class="outcomes" role="img" aria-label=${label} viewBox=${`0 0 ${SHOWN * 4} 16`} width=${SHOWN * 4} height="16">
    <title>${label}</title>
    ${attempts.map((attempt, at) => {
      const well = attempt.outcome === 'delivered'
      const height = well ? 6 : 16
      return html`<rect key=${attempt.number} class=${well ? 'well' : 'bad'} x=${(SHOWN - attempts.length + at) * 4} y=${16 - height} width="3" height=${height} />`
    })}</svg>`
}

function address(row) {
  return row.kind === 'webhook' ? row.url : `${row.exchange || '(default exchange)'} · ${row.routing_key}`
}

export function View({ data: [found, attempts, underWay], filter, setFilter, may, act, press, confirm, showSecret }) {
  // By names that may be those of what every object has.
  const recent = Object.create(null)
  for (const attempt of attempts) (recent[attempt.destination] ||= []).push(attempt)
  const lastOf = (name) => (recent[name] || []).slice(-SHOWN)
  const rotate = (name) => confirm({
    title: `Rotate the signing secret of ${name}?`,
    text: 'A new secret is made and shown once. The one before signs too for 24 hours, so that the receiver can change over.',
    verb: 'Rotate',
    run: async () => showSecret({ name, secret: await act('rotate', { destination: name }, `${name} has a new secret`) }),
  })
  const [typed, setTyped] = useState(filter.name || '')
  useEffect(() => setTyped(filter.name || ''), [filter.name])
  return html`
    ${(found.rows.length > 12 || filter.name) && html`<form class="filter" onSubmit=${(event) => { event.preventDefault(); setFilter({ name: typed }) }}>
      <${Field} label="Name contains" value=${typed} onInput=${(event) => setTyped(event.target.value)} /><button type="submit">Filter</button></form>`}
    ${found.rows.length > 500 && html`<p class="note">Here are 500 of them. Filter by name to see others.</p>`}
    ${!found.counted_all && html`<p class="note">More than 10,000 deliveries are outstanding or dead: those counted here are a part of them.</p>`}
    <${Table} label="Destinations" empty="There is no destination. SELECT outbox.add_webhook('crm', 'https://…') or outbox.add_rabbitmq('orders') adds one."
      columns=${['Destination', 'State', '#Waiting', '#In flight', '#Dead', 'Last attempts', 'Last error', ...(may.any ? ['Actions'] : [])]}>
      ${found.rows.slice(0, 500).map((row) => html`<tr key=${row.name} data-test="destination-row" data-name=${row.name} data-state=${row.state}>
        <th scope="row"><span class="name">${row.name}</span><span class="sub">${row.kind} · ${address(row)}</span>
          <span class="sub">wants ${row.event_types.join(', ')}${row.tenant_id != null ? ` of tenant ${row.tenant_id}` : ''}${row.filter ? ` where ${row.filter}` : ''}</span></th>
        <td><${State} is=${row.state} />${row.state === 'open' && row.open_until && html`<span class="sub"><${Countdown} until=${row.open_until} /></span>`}
          ${row.rotating && html`<span class="sub">two secrets sign</span>`}</td>
        <td class="number" data-label="Waiting">${row.waiting}</td>
        <td class="number" data-label="In flight" data-test="in-flight" title="Attempts of this relay that are under way">${Object.hasOwn(underWay, row.name) ? underWay[row.name] : 0}</td>
        <td class="number" data-label="Dead">${row.dead > 0 ? html`<a href=${`/ui/dead?destination=${encodeURIComponent(row.name)}`}>${row.dead}</a>` : row.dead}</td>
        <td><${Outcomes} attempts=${lastOf(row.name)} /></td>
        <td><${ErrorText} text=${row.state === 'active' ? lastOf(row.name).findLast((attempt) => attempt.error)?.error : row.last_error} /></td>
        ${may.any && html`<td class="actions">
          ${row.state === 'active' || row.state === 'half-open'
            ? may.pause && html`<button type="button" data-test="pause" aria-label=${`Pause ${row.name}`} onClick=${() => press('pause', { destination: row.name }, `${row.name} is paused`)}>Pause</button>`
            : may.resume && html`<button type="button" data-test="resume" aria-label=${`Resume ${row.name}`} onClick=${() => press('resume', { destination: row.name }, `${row.name} goes on`)}>Resume</button>`}
          ${row.state === 'open' && may.pause && html`<button type="button" data-test="pause" aria-label=${`Pause ${row.name}`} onClick=${() => press('pause', { destination: row.name }, `${row.name} is paused`)}>Pause</button>`}
          ${may.send_test && html`<button type="button" data-test="send-test" aria-label=${`Send test to ${row.name}`} onClick=${() => press('test', { destination: row.name }, (id) => ({ text: `A test event is on its way to ${row.name}: `, event: id }))}>Send test</button>`}
          ${may.rotate_secret && row.kind === 'webhook' && html`<button type="button" data-test="rotate" aria-label=${`Rotate secret of ${row.name}`} onClick=${() => rotate(row.name)}>Rotate secret</button>`}
        </td>`}
      </tr>`)}
    </${Table}>`
}
