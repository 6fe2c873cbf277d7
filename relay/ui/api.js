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

export async function logOut() {
  await post('/ui/logout', {})
  location.assign('/ui/')
}

// Calls back with the first word of the relay, with each change, and when the connection is lost.
export function listen({ onHello, onChanged, onLost }) {
  const source = new EventSource('/ui/stream')
  const parsed = (event) => JSON.parse(event.data)
  source.addEventListener('hello', (event) => onHello(parsed(event)))
  source.addEventListener('changed', (event) => onChanged(parsed(event)))
  source.addEventListener('error', () => {
    onLost()
    // A refusal ends the stream for good: perhaps the session is over, or too many look.
    if (source.readyState === EventSource.CLOSED) {
      setTimeout(() => read('me').then(() => listen({ onHello, onChanged, onLost }), () => {}), 5000)
    }
  })
  return source
}
