// The dialogs: to confirm what can't be taken back, with what it will do, and to show a secret once.

import { html, useEffect, useRef, useState } from './preact.js'

function Modal({ title, onClose, children }) {
  const dialog = useRef(null)
  useEffect(() => {
    const shown = dialog.current
    shown.showModal()
    // Closing gives the focus back to where it was.
    return () => shown.close()
  }, [])
  return html`<dialog ref=${dialog} aria-labelledby="dialog-title" onCancel=${(event) => { event.preventDefault(); onClose() }}>
    <h2 id="dialog-title">${title}</h2>${children}</dialog>`
}

// asks: { title, text, verb, danger, run }; text may be a promise, such as of a count.
export function Confirm({ asks, onClose }) {
  const [text, setText] = useState(null)
  const [busy, setBusy] = useState(false)
  const [error, setError] = useState(null)
  useEffect(() => {
    Promise.resolve(asks.text).then(setText, (failure) => setError(failure.message))
  }, [asks])
  const nothing = text?.nothing
  const run = async () => {
    setBusy(true)
    setError(null)
    try {
      await asks.run()
      onClose()
    } catch (failure) {
      setError(failure.message)
      setBusy(false)
    }
  }
  return html`<${Modal} title=${asks.title} onClose=${onClose}>
    <p aria-live="polite">${text == null && !error ? 'Counting…' : text?.text ?? text}</p>
    ${error && html`<p class="problem" role="alert">${error}</p>`}
    <div class="buttons">
      <button type="button" onClick=${onClose}>Cancel</button>
      <button type="button" class=${asks.danger ? 'danger' : 'primary'} data-test="confirm"
        disabled=${busy || text == null || nothing} onClick=${run}>${asks.verb}</button>
    </div></${Modal}>`
}

export function Secret({ name, secret, onClose }) {
  const [copied, setCopied] = useState(false)
  const copy = async () => {
    await navigator.clipboard.writeText(secret)
    setCopied(true)
  }
  return html`<${Modal} title=${`New signing secret of ${name}`} onClose=${onClose}>
    <p>It is shown this once. The one before signs too for 24 hours.</p>
    <p><code class="secret" data-test="secret">${secret}</code></p>
    <div class="buttons">
      ${navigator.clipboard && html`<button type="button" onClick=${copy}>${copied ? 'Copied' : 'Copy'}</button>`}
      <button type="button" class="primary" onClick=${onClose}>Done</button>
    </div></${Modal}>`
}
