// The user's API key: kept for this tab alone, and forgotten when it closes.

const NAME = "graft-key";

export const key = () => sessionStorage.getItem(NAME);
export const keep = (value) => sessionStorage.setItem(NAME, value);
export const forget = () => sessionStorage.removeItem(NAME);

/** The headers that a request shows the key in. */
export const shown = () => (key() ? { authorization: `Bearer ${key()}` } : {});
