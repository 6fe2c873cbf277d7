// The frame of all pages: where one is, how much there is, what the relay says. Each page is a module with its title, how it
// loads and how it looks; it loads again when the relay says that something has changed, and never by itself.

import { html, render, useCallback, useEffect, useRef, useState } from './preact.js'
import { act as post, actOnEach, listen, logOut, query, read } from './api.js'
import { Confirm, Secret } from './dialog.js'
import { Problem, span, Time } from './parts.js'
import * as overview from './overview.js'
import * as destinations from './destinations.js'
import * as dead from './dead.js'
import * as waiting from './waiting.js'
import * as event from './event.js'
import * as tail from './tail.js'

const PAGES = { '/ui/': overview, '/ui/destinations': destinations, '/ui/dead': dead, '/ui/waiting': waiting, '/ui/tail': tail }
const KEYS = { o: '/ui/', d: '/ui/destinations', l: '/ui/dead', w: '/ui/waiting', t: '/ui/tail' }

function place() {
  const of = location.pathname.match(/^\/ui\/events\/([^/]+)$/)
  const page = of ? event : PAGES[location.pathname] || overview
  const given = new URLSearchParams(location.search)
  const filter = Object.fromEntries((page.filters || []).map((name) => [name, given.get(name) || '']))
  return { page, filter, id: of && decodeURIComponent(of[1]).toLowerCase(), key: location.pathname + location.search }
}

function Counts({ stats }) {
  const figure = (label, test, value, href, says, tone) => html`<a class=${`count ${tone || ''}`} href=${href} title=${says}>
    <span class="label">${label}</span> <span class="value" data-test=${test}>${value ?? '–'}</span></a>`
  return html`<div class="counts" aria-live="polite" aria-atomic="true">
    ${figure('Pending', 'pending', stats?.pending, '/ui/waiting', 'Events that are owed to at least one destination')}
    ${figure('Processing', 'processing', stats?.processing, '/ui/waiting', 'Events that are being delivered')}
    ${figure('Dead', 'dead', stats?.dead, '/ui/dead', 'Events that were given up for at least one destination and are owed to none', stats?.dead && stats.dead !== '0' ? 'bad' : '')}
    <span class="count"><span class="label">Oldest waits</span> <span class="value">${stats?.oldest_s == null ? '–' : span(stats.oldest_s)}</span></span>
    <span class="count"><span class="label">p99 latency</span> <span class="value">${span(stats?.p99_s)}</span></span></div>`
}

function App() {
  const [at, setAt] = useState(place)
  const [me, setMe] = useState(null)
  const [stats, setStats] = useState(null)
  const [shown, setShown] = useState(null)
  const [error, setError] = useState(null)
  const [live, setLive] = useState(false)
  const [asks, confirm] = useState(null)
  const [secret, showSecret] = useState(null)
  const [notice, setNotice] = useState(null)
  const here = useRef(at)
  here.current = at
  // While rows are selected nothing moves: that there is news is kept for later.
  const still = useRef(false)
  const missed = useRef(false)

  const load = useCallback(async () => {
    const { page, filter, id, key } = here.current
    try {
      const data = await page.load(read, filter, id)
      if (here.current.key !== key) return
      setShown({ key, data })
      setError(null)
    } catch (failure) {
      setError(failure.message)
    }
  }, [])
  // Who this is and what the role may do, and the figures; after that the relay sends them.
  const loadAll = useCallback(async () => {
    try {
      const [who, figures] = await Promise.all([read('me'), read('stats')])
      setMe(who)
      setStats(figures)
    } catch (failure) {
      setError(failure.message)
    }
    await load()
  }, [])
  const holdStill = useCallback((held) => {
    still.current = held
    if (!held && missed.current) load()
    missed.current = false
  }, [])
  const go = useCallback((href) => {
    history.pushState(null, '', href)
    setAt(place())
    window.scrollTo(0, 0)
  }, [])

  useEffect(() => {
    let first = true
    const source = listen({
      onHello: () => { setLive(true); if (first) loadAll(); first = false },
      onChanged: (news) => { setLive(true); if (news.stats) setStats(news.stats); if (news.error) setError(news.error); if (first) loadAll(); else if (still.current) missed.current = true; else load(); first = false },
      onLost: () => { setLive(false); if (first) loadAll(); first = false },
    })
    const back = () => setAt(place())
    const click = (happened) => {
      const link = happened.target.closest?.('a[href^="/ui/"]')
      if (!link || happened.button || happened.metaKey || happened.ctrlKey || happened.shiftKey || link.target) return
      happened.preventDefault()
      go(link.getAttribute('href'))
    }
    let before = ''
    const key = (pressed) => {
      if (pressed.target.closest('input, textarea, dialog') || pressed.ctrlKey || pressed.metaKey || pressed.altKey) return
      if (before === 'g' && KEYS[pressed.key]) go(KEYS[pressed.key])
      else if (pressed.key === '/') { document.querySelector('main input')?.focus(); pressed.preventDefault() }
      else if (pressed.key === 'r') loadAll()
      before = pressed.key
    }
    addEventListener('popstate', back)
    addEventListener('click', click)
    addEventListener('keydown', key)
    return () => { source.close(); removeEventListener('popstate', back); removeEventListener('click', click); removeEventListener('keydown', key) }
  }, [])
  const first = useRef(true)
  useEffect(() => {
    document.title = `${at.page.title} – pg_outbox`
    if (!first.current) { load(); setNotice(null) }
    first.current = false
  }, [at.key])

  const may = { ...me?.role.may }
  may.any = may.pause || may.resume || may.send_test || may.rotate_secret
  const readOnly = me && !Object.values(may).some(Boolean)
  // Does it, for each of a list, and says so; what is refused is for the caller, such as a dialog.
  const act = async (action, fields, says) => {
    setNotice(null)
    try {
      const result = await (Array.isArray(fields) ? actOnEach : post)(action, fields)
      setNotice(typeof says === 'function' ? says(result) : says)
      return result
    } finally {
      load()
      read('stats').then(setStats, () => {})
    }
  }
  // The same for a button of the page itself.
  const press = (...what) => act(...what).catch((failure) => setError(failure.message))
  const setFilter = (filter) => go(location.pathname + query(filter))
  const data = shown?.key === at.key ? shown.data : null
  const link = (href, label) => html`<a href=${href} aria-current=${location.pathname === href ? 'page' : null}>${label}</a>`
  return html`
    <a class="skip" href="#main">Skip to the content</a>
    <header>
      <div class="bar">
        <a class="brand" href="/ui/"><img src="/ui/assets/icon.svg" alt="" width="24" height="24" /> pg_outbox</a>
        <nav aria-label="Pages">${link('/ui/', 'Overview')}${link('/ui/destinations', 'Destinations')}${link('/ui/dead', html`Dead<span class="on-wide"> letters</span>`)}${link('/ui/waiting', 'Waiting')}${link('/ui/tail', 'Tail')}</nav>
        <button type="button" class="quiet" onClick=${logOut}>Log out</button>
      </div>
    </header>
    <div class="strip"><${Counts} stats=${stats} /></div>
    <main id="main" tabindex="-1">
      <div class="title"><h1>${at.page.title}</h1>
        <p class="as-of"><span class=${live ? 'live' : 'lost'}>${live ? 'live' : 'not connected'}${stats && html`, as of <${Time} at=${stats.at} />`}</span>
          <button type="button" class="quiet" onClick=${loadAll} title="Refresh (r)">Refresh</button></p></div>
      ${readOnly && html`<p class="note" data-test="read-only">This page is read-only: the role ${me.role.role} may read, and change nothing. <code>SELECT outbox.grant_operator('${me.role.role}')</code> lets it.</p>`}
      <${Problem} error=${error} />
      <div role="status">${notice && html`<p class="notice">${notice.text || notice}${notice.event && html`<a href=${`/ui/events/${notice.event}`}>show it</a>`}</p>`}</div>
      ${data ? html`<${at.page.View} key=${at.page.title} ...${{ data, stats, may, go, act, press, confirm, holdStill, showSecret, setFilter, filter: at.filter, id: at.id }} />` : !error && html`<p class="empty">Loading…</p>`}
    </main>
    <footer>${me && html`<span>${me.database}</span><span>relay ${me.consumer}</span><span>version ${me.version}</span>`}</footer>
    ${asks && html`<${Confirm} asks=${asks} onClose=${() => confirm(null)} />`}
    ${secret && html`<${Secret} ...${secret} onClose=${() => showSecret(null)} />`}`
}

render(html`<${App} />`, document.getElementById('app'))
