// The overview: what is not well, with what to do about it; how much there is; how fast it goes.

import { html, span, State, Table, Time, EventLink } from './parts.js'

export const title = 'Overview'
export const load = (read) => read('overview')

export function View({ data, stats, go }) {
  const bad = data.filter((check) => !check.ok)
  const open = (event) => {
    event.preventDefault()
    const id = new FormData(event.target).get('event').trim()
    if (id) go(`/ui/events/${encodeURIComponent(id)}`)
  }
  return html`
    ${bad.length > 0 && html`<section class="checks" aria-label="Not well">
      ${bad.map((check) => html`<div class="check" key=${check.check}>
        <h2><${State} is="not well" /> ${check.check.replaceAll('_', ' ')}</h2>
        <p>${check.detail}</p><p class="hint">${check.hint}</p></div>`)}
    </section>`}
    ${bad.length === 0 && html`<p><${State} is="well" says=${`All ${data.length} checks are well.`} /></p>`}
    ${stats && html`<section aria-labelledby="figures"><h2 id="figures">Since <${Time} at=${stats.since} /></h2>
      <dl class="figures">
        <div><dt>Published</dt><dd>${stats.published ?? '–'}</dd></div>
        <div><dt>Wanted by nobody</dt><dd>${stats.unrouted ?? '–'}</dd></div>
        <div><dt>p50 latency</dt><dd>${span(stats.p50_s)}</dd></div>
        <div><dt>p95 latency</dt><dd>${span(stats.p95_s)}</dd></div>
        <div><dt>p99 latency</dt><dd>${span(stats.p99_s)}</dd></div>
        <div><dt>Consumers attached</dt><dd>${stats.consumers}</dd></div>
        <div><dt>Worker</dt><dd>${stats.worker}</dd></div>
      </dl></section>`}
    <form class="filter" onSubmit=${open}>
      <label class="field wide"><span>Find an event by its event_id</span><input name="event" autocomplete="off" spellcheck=${false} /></label>
      <button type="submit">Show</button>
    </form>
    <section aria-labelledby="checks"><h2 id="checks">Checks</h2>
      <${Table} label="Health checks" columns=${['Check', 'State', 'Detail']} empty="No check was made.">
        ${data.map((check) => html`<tr key=${check.check}><th scope="row">${check.check.replaceAll('_', ' ')}</th>
          <td><${State} is=${check.ok ? 'well' : 'not well'} /></td><td>${check.detail}</td></tr>`)}
      </${Table}></section>`
}
