// Requests to the relay. Changes carry the header that no form of another page can send.

export class Refused extends Error {
  constructor(status, message) {
    super(message)
    this.status = status
  }
}

async function answer(response) {
  if (response.status === 401) {
    // The relay was restarted, or somebody logged out: the login is where this page is.
    location.reload()
    return new Promise(() => {})
  }
  const text = await response.text()
  let body
  try {
    body = JSON.parse(text)
  } catch {
    throw new Refused(response.status, text || response.statusText)
  }
  if (!response.ok) throw new Refused(response.status, body.error)
  return body
}

export function query(fields) {
  const given = Object.entries(fields).filter(([, value]) => value !== '' && value != null)
  return given.length ? '?' + new URLSearchParams(given) : ''
}

export async function read(path, fields = {}) {
  return answer(await fetch(`/ui/api/${path}${query(fields)}`, { headers: { accept: 'application/json' } }))
}

async function post(path, body) {
  const headers = { 'content-type': 'application/json', 'x-outbox-request': '1' }
  return answer(await fetch(path, { method: 'POST', headers, body: JSON.stringify(body) }))
}

// What a function of the database returned, as text.
export async function act(action, fields = {}) {
  return (await post(`/ui/api/${action}`, fields)).result
}

// The same for each of many, one after the other: how many of them it changed. A refusal ends it; what was done stays done.
export async function actOnEach(action, many) {
  let changed = 0
  for (const fields of many) if (await act(action, fields) === 'true') changed += 1
  return String(changed)
}

export async function logOut() {
  await post('/ui/logout', {})
  location.assign('/ui/')
}

// As soon as the relay answers, which it does from its memory here.
function again(then) {
  setTimeout(() => read('tail', { after: Number.MAX_SAFE_INTEGER }).then(then, () => again(then)), 5000)
}

// Calls back with the first word of the relay, with each change, and when the connection is lost.
export function listen({ onHello, onChanged, onLost }) {
  const source = new EventSource('/ui/stream')
  const parsed = (event) => JSON.parse(event.data)
  source.addEventListener('hello', (event) => onHello(parsed(event)))
  source.addEventListener('changed', (event) => onChanged(parsed(event)))
  source.addEventListener('error', () => {
    onLost()
    // A refusal ends the stream for good: perhaps the session is over, too many look, or a proxy has nobody behind it. What
    // was missed meanwhile nobody tells a new stream: its first word stands for a change.
    if (source.readyState === EventSource.CLOSED) again(() => listen({ onHello: onChanged, onChanged, onLost }))
  })
  return source
}
