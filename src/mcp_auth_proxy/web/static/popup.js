// The last page of an authorization in a popup tells how it ended: the page that opened it, at exactly the origin that
// was agreed on before, and our own pages, because a sign-in page may have severed the popup from its opener. Then the
// popup closes, if there is nothing left to do in it, once its user had time to see which account is connected.
(() => {
  const { message: text, origin } = document.currentScript.dataset;
  const message = JSON.parse(text);
  const told = `${message.type}.${message.flow}`;
  try {
    // Once for each end, also if the page is loaded again. Without a flow, each page is an end of its own.
    if (message.flow !== null && sessionStorage.getItem(told) === message.status) return;
    sessionStorage.setItem(told, message.status);
  } catch {
    // Without storage, a page that is loaded again repeats the message.
  }
  if (window.opener) window.opener.postMessage(message, origin);
  const channel = new BroadcastChannel(message.type);
  channel.postMessage(message);
  channel.close();
  if (message.status === "connected") setTimeout(() => window.close(), 2000);
})();
