// What several pages are made of. Texts of events and errors are text nodes, never markup.

import { html, useEffect, useState } from './preact.js'

export { html, useEffect, useState }

const clock = new Intl.DateTimeFormat(undefined, { hour: '2-digit', minute: '2-digit', second: '2-digit', hourCycle: 'h23' })
const day = new Intl.DateTimeFormat(undefined, { month: 'short', day: 'numeric' })

// A moment: the time of day, and the day where it is not today. The exact one is in the title. PostgreSQL has some that no
// calendar of a browser has, such as infinity: they are shown as it says them.
export function Time({ at }) {
  if (!at) return html`<span class="none">–</span>`
  const date = new Date(at)
  if (Number.isNaN(date.getTime())) return html`<span>${at}</span>`
  const text = date.toDateString() === new Date().toDateString() ? clock.format(date) : `${day.format(date)} ${clock.format(date)}`
  return html`<time datetime=${at} title=${at}>${text}</time>`
}

// Seconds as somebody would say them.
export function span(seconds) {
  if (seconds == null) return '–'
  if (seconds < 1) return `${Math.round(seconds * 1000)} ms`
  if (seconds < 120) return `${seconds < 10 ? seconds.toFixed(1) : Math.round(seconds)} s`
  if (seconds < 7200) return `${Math.round(seconds / 60)} min`
  if (seconds < 172800) return `${Math.round(seconds / 3600)} h`
  return `${Math.round(seconds / 86400)} d`
}

// Counts down on this side alone; what is over by then is told by the relay.
export function Countdown({ until }) {
  const left = () => Math.ceil((new Date(until) - Date.now()) / 1000)
  const [seconds, set] = useState(left)
  useEffect(() => {
    set(left())
    const timer = setInterval(() => { set(left()); if (left() <= 0) clearInterval(timer) }, 1000)
    return () => clearInterval(timer)
  }, [until])
  return seconds > 0 ? html`<span class="countdown">next try in ${span(seconds)}</span>` : null
}

const ICONS = {
  active: '●', delivered: '●', processed: '●',
  open: '▲', 'half-open': '△', unavailable: '▲', throttled: '▲', unable: '▲',
  paused: '❚❚', pending: '○', scheduled: '◷', processing: '◐',
  disabled: '■', failed: '✕', rejected: '✕', gone: '■', 'not well': '✕', well: '●',
}
const TONES = {
  active: 'good', delivered: 'good', processed: 'good', well: 'good',
  open: 'bad', disabled: 'bad', failed: 'bad', rejected: 'bad', gone: 'bad', unavailable: 'bad', 'not well': 'bad',
  'half-open': 'warn', throttled: 'warn', unable: 'warn', paused: 'warn',
}

// A word with a sign and a colour: the colour is never all there is.
export function State({ is, says = is, test }) {
  return html`<span class=${`state ${TONES[is] || ''}`}><span aria-hidden="true">${ICONS[is] || '○'}</span> <span class="word" data-test=${test}>${says}</span></span>`
}

export function EventLink({ id, children }) {
  return html`<a class="id" href=${`/ui/events/${id}`} title=${id}>${children || `…${id.slice(-12)}`}</a>`
}

export function aggregate(row) {
  return row.aggregate_id == null ? '–' : `${row.aggregate_type || ''} ${row.aggregate_id}`.trim()
}

// An error's text, cut by the style until somebody asks for the rest.
export function ErrorText({ text }) {
  const [open, set] = useState(false)
  if (!text) return html`<span class="none">–</span>`
  if (text.length < 90) return html`<span class="error-text">${text}</span>`
  return html`<button type="button" class=${`error-text more ${open ? 'open' : ''}`} aria-expanded=${String(open)}
    onClick=${() => set(!open)}>${text}</button>`
}

// A table that scrolls by itself where the screen is narrow; each cell knows its column for the layout there.
export function Table({ label, columns, children, empty }) {
  if (children.length === 0) return html`<p class="empty">${empty}</p>`
  return html`<div class="table" role="group" aria-label=${label} tabindex="0"><table>
    <caption class="hidden">${label}</caption>
    <thead><tr>${columns.map((column) => html`<th scope="col" class=${column.startsWith('#') ? 'number' : column === 'Actions' ? 'actions' : null}>${column.replace('#', '')}</th>`)}</tr></thead>
    <tbody>${children}</tbody></table></div>`
}

export function Field({ label, ...rest }) {
  return html`<label class="field"><span>${label}</span><input ...${rest} /></label>`
}

export function Problem({ error }) {
  return error ? html`<p class="problem" role="alert">${error}</p>` : null
}
