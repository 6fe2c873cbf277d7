// Dead letters: which there are, in groups and one by one, and another try or the end for one, for those that are selected,
// or for all that match a filter.

import { act as ask } from './api.js'
import { aggregate, ErrorText, EventLink, Field, html, Table, Time, useEffect, useState } from './parts.js'

export const title = 'Dead letters'
export const filters = ['destination', 'type', 'error', 'since', 'until']
export const load = (read, filter) => read('dead', filter)

// A field holds the local time; what travels says its zone. An address may say what only PostgreSQL understands, such as
// yesterday.
const toInput = (iso) => {
  const date = new Date(iso || NaN)
  if (Number.isNaN(date.getTime())) return ''
  return new Date(date - date.getTimezoneOffset() * 60000).toISOString().slice(0, 16)
}
const fromInput = (text) => (text ? new Date(text).toISOString() : '')

function Filter({ filter, setFilter }) {
  const [draft, setDraft] = useState(filter)
  useEffect(() => setDraft(filter), [JSON.stringify(filter)])
  const put = (name, change = (value) => value) => (event) => setDraft({ ...draft, [name]: change(event.target.value) })
  const any = filters.some((name) => filter[name])
  return html`<form class="filter" onSubmit=${(event) => { event.preventDefault(); setFilter(draft) }}>
    <${Field} label="Destination" value=${draft.destination || ''} onInput=${put('destination')} placeholder="any" />
    <${Field} label="Type" value=${draft.type || ''} onInput=${put('type')} placeholder="order.*" />
    <${Field} label="Error" value=${draft.error || ''} onInput=${put('error')} placeholder="*timeout*" />
    <${Field} label="Created from" type="datetime-local" value=${toInput(draft.since)} onInput=${put('since', fromInput)} />
    <${Field} label="Created before" type="datetime-local" value=${toInput(draft.until)} onInput=${put('until', fromInput)} />
    <button type="submit">Filter</button>
    ${any && html`<button type="button" onClick=${() => setFilter({})}>Clear</button>`}
  </form>`
}

export function View({ data, filter, setFilter, may, act, confirm, holdStill }) {
  const any = filters.some((name) => filter[name])
  const which = any ? 'that match the filter' : 'there are'
  // The count comes from the function that will do it; it says how many events, at however many destinations.
  const count = async (action, says) => {
    const events = await ask(action, { ...filter, preview: true })
    return events === '0' ? { text: 'None match any more.', nothing: true } : says(events === '1' ? '1 event' : `${events} events`)
  }
  const replayAll = () => confirm({
    title: 'Replay dead letters', verb: 'Replay',
    text: count('replay-all', (events) => `${events} will be owed again: all dead letters ${which}.`),
    run: () => act('replay-all', filter, (done) => `${done} events are owed again`),
  })
  const purgeAll = () => confirm({
    title: 'Purge dead letters', verb: 'Purge', danger: true,
    text: count('purge-all', (events) => `The dead letters of ${events} will be removed for good: all ${which}.`),
    run: () => act('purge-all', filter, (done) => `The dead letters of ${done} events are gone`),
  })
  const [selected, select] = useState(new Set())
  const keyOf = (row) => `${row.id} ${row.destination}`
  // What has left the list is not selected any more.
  const chosen = data.rows.filter((row) => selected.has(keyOf(row)))
  const mayAny = may.replay || may.purge
  useEffect(() => {
    holdStill(chosen.length > 0)
    return () => holdStill(false)
  }, [chosen.length > 0])
  const toggle = (row) => {
    const now = new Set(chosen.map(keyOf))
    if (!now.delete(keyOf(row))) now.add(keyOf(row))
    select(now)
  }
  const letters = (count) => (count === 1 ? '1 dead letter' : `${count} dead letters`)
  const onChosen = (action, says) => async () => {
    await act(action, chosen.map((row) => ({ event_id: row.event_id, destination: row.destination || '' })), says)
    select(new Set())
  }
  const replayChosen = () => confirm({
    title: 'Replay the selected?', verb: 'Replay', text: `${letters(chosen.length)}, as selected, will be owed again.`,
    run: onChosen('replay', (done) => `${letters(Number(done))} of ${chosen.length} selected: owed again`),
  })
  const purgeChosen = () => confirm({
    title: 'Purge the selected?', verb: 'Purge', danger: true,
    text: `${letters(chosen.length)}, as selected, will be removed for good; each event too, unless others are owed it or gave it up.`,
    run: onChosen('purge', (done) => `${letters(Number(done))} of ${chosen.length} selected: gone`),
  })
  const one = (row) => `${row.event_type} for ${row.destination || 'a consumer of its own'}`
  const replay = (row) => confirm({
    title: 'Replay this dead letter?', verb: 'Replay', text: `1 event, ${one(row)}, will be owed again.`,
    run: () => act('replay', { event_id: row.event_id, destination: row.destination || '' }, `${one(row)} is owed again`),
  })
  const purge = (row) => confirm({
    title: 'Purge this dead letter?', verb: 'Purge', danger: true,
    text: `1 dead letter, ${one(row)}, will be removed for good; the event too, unless others are owed it or gave it up.`,
    run: () => act('purge', { event_id: row.event_id, destination: row.destination || '' }, `${one(row)} is gone`),
  })
  return html`
    <${Filter} filter=${filter} setFilter=${setFilter} />
    ${data.found > 0 && html`<div class="bulk">
      <p>${data.found > 5000 ? 'More than 5,000' : data.found} dead ${data.found === 1 ? 'letter' : 'letters'} ${any ? 'match' : ''}${data.found > 200 ? '; the newest 200 are listed' : ''}</p>
      ${may.replay_failed && html`<button type="button" data-test="replay" onClick=${replayAll}>Replay all${any ? ' that match' : ''}…</button>`}
      ${may.purge_failed && html`<button type="button" class="danger" data-test="purge" disabled=${Boolean(filter.since)} title=${filter.since ? 'A purge has no beginning: clear “Created from”' : null} onClick=${purgeAll}>Purge all${any ? ' that match' : ''}…</button>`}
    </div>`}
    ${data.groups.length > 1 && html`<section aria-labelledby="groups"><h2 id="groups">By destination, type and error</h2>
      <${Table} label="Groups of dead letters" columns=${['Destination', 'Type', 'Error', '#Count', 'Last created', 'Actions']}>
        ${data.groups.map((group) => html`<tr key=${`${group.destination} ${group.event_type} ${group.last_error}`}>
          <td>${group.destination || '–'}</td><td>${group.event_type}</td><td><${ErrorText} text=${group.last_error} /></td>
          <td class="number">${group.count}</td><td><${Time} at=${group.last} /></td>
          <td class="actions"><button type="button" aria-label=${`Filter by ${group.destination}, ${group.event_type}`} onClick=${() => setFilter({ ...filter, destination: group.destination || '', type: group.event_type, error: (group.last_error || '').slice(0, 290) + (group.last_error?.length >= 290 ? '*' : '') })}>Filter</button></td></tr>`)}
      </${Table}></section>`}
    <section aria-labelledby="letters"><h2 id="letters">${data.groups.length > 1 ? 'One by one' : 'Dead letters'}</h2>
    ${mayAny && data.rows.length > 0 && html`<div class="bulk">
      <label class="select"><input type="checkbox" data-test="select-listed" checked=${chosen.length === data.rows.length}
        onChange=${(event) => select(new Set(event.target.checked ? data.rows.map(keyOf) : []))} /> Select all ${data.rows.length} listed</label>
      <p aria-live="polite">${chosen.length > 0 && `${chosen.length} selected; the list stands still meanwhile`}</p>
      ${may.replay && html`<button type="button" data-test="replay-selected" disabled=${chosen.length === 0} onClick=${replayChosen}>Replay selected…</button>`}
      ${may.purge && html`<button type="button" class="danger" data-test="purge-selected" disabled=${chosen.length === 0} onClick=${purgeChosen}>Purge selected…</button>`}
    </div>`}
    <${Table} label="Dead letters" empty=${any ? 'No dead letter matches.' : 'There are no dead letters.'}
      columns=${['Event', 'Destination', 'Aggregate', '#Attempts', 'Created', 'Error', ...(mayAny ? ['Actions'] : [])]}>
      ${data.rows.map((row) => html`<tr key=${keyOf(row)} data-test="dead-row" data-event-id=${row.event_id} data-destination=${row.destination}>
        <th scope="row"><span class="name">${row.event_type}</span><span class="sub"><${EventLink} id=${row.event_id} /></span></th>
        <td>${row.destination || '–'}</td><td>${aggregate(row)}</td><td class="number" data-label="Attempts">${row.attempts}</td>
        <td><${Time} at=${row.created_at} /></td><td><${ErrorText} text=${row.last_error} /></td>
        ${mayAny && html`<td class="actions">
          <label class="select"><input type="checkbox" data-test="select" aria-label=${`Select ${row.event_type} for ${row.destination}`} checked=${selected.has(keyOf(row))} onChange=${() => toggle(row)} /></label>
          ${may.replay && html`<button type="button" data-test="replay" aria-label=${`Replay… ${row.event_type} for ${row.destination}`} onClick=${() => replay(row)}>Replay…</button>`}
          ${may.purge && html`<button type="button" class="danger" data-test="purge" aria-label=${`Purge… ${row.event_type} for ${row.destination}`} onClick=${() => purge(row)}>Purge…</button>`}
        </td>`}
      </tr>`)}
    </${Table}></section>`
}
